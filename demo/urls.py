from django.urls import path

from demo import views

urlpatterns = [
    path("", views.wall, name="wall"),
    path("messages", views.post, name="post"),
    path("events", views.events, name="events"),
]
