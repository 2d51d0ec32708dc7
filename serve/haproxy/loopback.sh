#!/bin/sh
# Ray Serve's HAProxy, but nothing of it open to other machines that is not meant to be: Ray's
# configuration puts the metrics and the statistics page on every interface and lets everybody on
# the machine control it. RAYWARD_LISTEN is where the service itself listens, and how: Ray knows of
# no TLS here, and would put what stands behind HAProxy on the same interface.
# Every request gets the name of its service: an ingress that took the port of another service's
# dead one would otherwise answer for it.
# Where no ingress answers, Ray would have HAProxy say 500 in plain text; RAYWARD_GONE says what it is.
# An id of a request is passed on, and sent back, only if it is one: see serve/monitoring/request_log.py.
# What HAProxy answers itself gets one, too: clients tell the service's replies by it from a proxy's.
# Called as HAProxy is: haproxy -db -f CONFIG [options]
config=$3
safe=$config.loopback
sed -e 's/bind :\([0-9]\)/bind 127.0.0.1:\1/' -e 's/bind \*:/bind 127.0.0.1:/' \
    -e 's/mode 666/mode 600/' \
    -e "s|errorfile \([0-9]*\) .*|errorfile \1 $RAYWARD_GONE|" \
    -e "/^frontend http_frontend/a\\    http-request set-header X-Rayward-Service $RAYWARD_SERVICE" \
    -e '/^frontend http_frontend/a\    http-request del-header x-request-id unless { req.hdr(x-request-id) -m reg ^[A-Za-z0-9_-]{1,64}$ }' \
    -e '/^frontend http_frontend/a\    http-request set-header x-request-id %[uuid] unless { req.hdr(x-request-id) -m found }' \
    -e '/^frontend http_frontend/a\    http-request set-var(txn.rayward_id) req.hdr(x-request-id)' \
    -e '/^frontend http_frontend/a\    http-after-response set-header x-request-id %[var(txn.rayward_id)] unless { res.hdr(x-request-id) -m found }' \
    "$config" > "$safe" || exit 1
if [ -n "$RAYWARD_LISTEN" ]; then
    sed -i -e "/^frontend http_frontend/,/bind/ s|bind .*|bind $RAYWARD_LISTEN|" "$safe" || exit 1
fi
shift 3
exec "$RAYWARD_HAPROXY" -db -f "$safe" "$@"
