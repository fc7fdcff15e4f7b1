"""What a step costs in seconds: products by shape, traffic by bytes, collectives by message, pipelines by schedule."""
