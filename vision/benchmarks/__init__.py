"""MUFAC, MUCAC and any folder of faces."""
