from django.urls import path

from demo import resources, stock
from demo.stage import views
from demo.stage.buttons import ALONE, PAIRS

urlpatterns = [
    path("", views.page, name="page"),
    path("events", views.events, name="events"),
    path("messages", views.post, name="post"),
    path("run/<kind>", views.run, name="run"),
    path("reset", views.reset, name="reset"),
    path("static/<name>", views.static, name="static"),
    # Each ending, with scoped's connection and with stock Django's ...
    *(path(f"scoped/{one.name}", views.ending(one), {"db": resources.db}) for one in PAIRS),
    *(path(f"stock/{one.name}", views.ending(one), {"db": stock.db}) for one in PAIRS),
    # ... and those that need what stock Django has no counterpart of.
    *(path(f"scoped/{one.name}", views.ending(one)) for one in ALONE),
]
