"""
Promises 6, 15 and 16 under real servers: every way in which a request can end,
driven from outside over TCP, on real PostgreSQL and real Redis.

``python -m tests.servers`` runs every case under every server and writes
``docs/servers.md``. It needs the dependency group ``servers``.
"""
