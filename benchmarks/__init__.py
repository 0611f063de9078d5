"""One script per question. They need only torch; plots need matplotlib."""
