"""Implementations of grouped cross attention. They never import one another; `api` picks one."""
