"""What reaches the MLflow store, and how: the only folder of `grid` that knows MLflow."""
