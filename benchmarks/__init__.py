"""One script per question. Each needs torch alone; plots need matplotlib."""
