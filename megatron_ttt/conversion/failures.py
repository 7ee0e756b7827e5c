"""What a conversion can end with besides a mistake of the user."""


class VerificationFailed(Exception):
    """The models differ; the message names the first stage."""
