"""What people see of a training: progress, plots, the report, the model card."""
