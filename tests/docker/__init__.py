"""Containers: the images, the gpu pool's job template, runs in containers, secrets."""
