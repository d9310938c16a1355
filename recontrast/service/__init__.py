"""An HTTP service that scores images, and its page for the browser."""
