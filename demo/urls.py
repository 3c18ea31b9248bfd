from django.urls import include, path

from demo import endings, resources, stock, views

urlpatterns = [
    path("", views.wall, name="wall"),
    path("messages", views.post, name="post"),
    path("events", views.events, name="events"),
    path("static/<name>", views.static, name="static"),
    path("scoped/", include(endings), {"db": resources.db}),
    path("scoped/commit", endings.commit),
    path("scoped/background", endings.background),
    # asgi.py has Django's own handler serve what is below /stock/.
    path("stock/", include(endings), {"db": stock.db}),
    path("reset", views.reset, name="reset"),
]
