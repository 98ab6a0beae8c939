"""From a Python signature to a JSON schema and back: annotations, checks of arguments, stubs."""
