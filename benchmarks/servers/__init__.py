"""The servers of a cluster, real and on this machine: PostgreSQL, an S3 API, and MLflow's server on both."""
