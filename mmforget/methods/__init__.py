"""Methods that every modality shares; one file is one method."""
