"""The caller's side: ``Sandbox``, ``AsyncSandbox``, their connections, and the engine process of an embedded one."""
