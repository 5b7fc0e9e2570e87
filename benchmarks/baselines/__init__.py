"""What others do for masks and orders, restated so that it runs beside ours in one process."""
