"""One thin module per stage, and the record of releases in MLflow: what stands between the flows and `modelmint`."""
