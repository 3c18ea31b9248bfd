"""The Django project that the tests run in."""

SECRET_KEY = "tests"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["scoped"]
DATABASES: dict[str, dict[str, str]] = {}
ROOT_URLCONF = "tests.urls"
MIDDLEWARE: list[str] = []
USE_TZ = True
