"""The HTTP interface, in OpenAI's form."""
