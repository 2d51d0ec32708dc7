"""The reward functions and environments that trainers take, for a running service.

Each module's docstring shows the lines of its trainer's configuration. None imports a trainer; the
address is an argument or $RAYWARD_URL, the token $RAYWARD_TOKEN.
"""
