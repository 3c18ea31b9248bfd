"""
``python -m benchmarks``: what ``scoped`` costs, beside hand-written code, stock
Django and other libraries, in one run. Writes ``docs/benchmarks.md`` and its
charts. ``--quick`` finishes in a minute. ``python -m benchmarks.instructions``:
the same work on scopes in instructions, which other work on the machine does not disturb.

``work`` says what is built, ``contenders`` and ``peers`` who builds it, ``questions``
how much of it, ``check`` that all of them built the same; ``project`` and ``worker``
are the web applications and the processes that serve them, ``counted`` a process whose
instructions are counted; ``measure`` and ``report`` do as they are called.
"""
