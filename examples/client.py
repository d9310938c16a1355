"""Send images to `recontrast serve` and print their scores and decisions; only Python's standard library is needed.

recontrast serve runs/mine
python examples/client.py http://127.0.0.1:8000 photos/*.png
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

address, *paths = sys.argv[1:]
headers = {"Content-Type": "application/octet-stream"}
if token := os.environ.get("RECONTRAST_TOKEN"):
    headers["Authorization"] = f"Bearer {token}"
for path in paths:
    with open(path, "rb") as file:
        request = urllib.request.Request(f"{address.rstrip('/')}/predict", file.read(), headers)
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            break
        except urllib.error.HTTPError as error:
            if error.code != 429:  # 429: the queue is full
                sys.exit(f"{path}: {json.load(error)['error']}")
            time.sleep(float(error.headers["Retry-After"]))
    print(path, answer["score"], answer["p_value"], answer["decision"])
