"""One request under any handler: opened, served, ended. Stands on the core."""
