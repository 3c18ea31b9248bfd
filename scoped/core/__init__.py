"""The core: resources and scopes. Knows no Django, and imports nothing from outside this folder."""
