"""What went wrong with the Hub, in a sentence, and whether to try again."""

import httpx2
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

HUB_ERRORS = (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError)
TEMPORARY = (408, 429, 500, 502, 503, 504)  # HTTP states after which a new try may succeed


def is_temporary(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TEMPORARY
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of an upload of weights
        return is_temporary(error.__cause__)
    return isinstance(error, httpx2.TransportError)


def explain(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return explain(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        if error.response.status_code in (401, 403):
            return "the Hub refused the token; log in with `hf auth login`, or give --hub_token"
    if isinstance(error, HFValidationError):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
