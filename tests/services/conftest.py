"""What the tests with real servers share."""

from s3_server import bucket, s3_server

__all__ = ["bucket", "s3_server"]
