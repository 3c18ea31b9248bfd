"""
Real Sentry, OpenTelemetry, Datadog, New Relic, django-debug-toolbar and Starlette beside scoped:
each in a program of its own, for they patch Django in the whole process.
"""
