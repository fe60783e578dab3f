"""The secret of a start."""

TOKEN = "MIXMAE_TOKEN"
"""The environment variable with the secret that a start's supervisors share; on no command line."""
