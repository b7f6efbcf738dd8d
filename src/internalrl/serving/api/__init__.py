"""The HTTP interface, in OpenAI's form."""

from internalrl.extras import require

require(
    "serve", "fastapi", "h11", "prometheus_client", "pydantic", "pydantic_core", "sqlalchemy", "starlette", "uvicorn"
)
