"""Ways into other libraries. Nothing here is imported by `import leanattn`."""
