"""Decode rows to arrays: pictures, encodings, transforms, splits."""
