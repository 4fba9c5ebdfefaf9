"""What images exist: labelled image sets, their classes, and which of them are base or field."""
