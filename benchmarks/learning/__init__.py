"""Whether a policy gets better by our rewards: the trainers of examples/, with their curves."""
