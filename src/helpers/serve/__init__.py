"""Export, execution, inspection and timing of model files."""
