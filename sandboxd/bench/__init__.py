"""What isolation costs on this host: a policy's runs beside the raw floors and beside every peer found here.

``measure.measure`` does it and returns plain values; ``report`` and ``plot`` show them. benchmarks/ shares the parts:

- ``stats``: percentiles, series of samples with their failures, intervals of ratios;
- ``facts``: what the figures depend on;
- ``warm``: the floor, an interpreter warmed as the policy says that only forks;
- ``commands``, ``peers``: other programs, timed from exec to exit, and how each is asked for a sealed Python;
- ``contest``: who is measured next, so that noise meets all alike;
- ``load``, ``daemon``: closed loops, and a daemon in a process of its own.
"""
