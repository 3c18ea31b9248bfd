"""
Runs Django's own tests with our handler in place of Django's::

    python -m tests.django_suite            # our handler, our client handler, our receivers
    python -m tests.django_suite --stock    # the same tests as they are, to compare with

Not a part of our own test run: it takes a minute or two, and downloads the
source distribution of the installed Django, which holds the tests.
"""
