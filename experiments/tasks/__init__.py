"""Tasks: what a model is asked and how its answer is scored. One module and one YAML each."""
