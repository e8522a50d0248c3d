"""One training in torch; knows neither Ray nor MLflow."""
