# One image for both roles: the API by default, the worker by command:
#   docker run … celery -A worker.celery_app worker --loglevel=info

FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Requirements first: they change less often than the code, and this is the slow layer.
COPY requirements/ requirements/
RUN pip install -r requirements/runtime.txt -c requirements/constraints.txt

FROM python:3.12-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin mediagen \
    && mkdir -p /srv/mediagen /data/media \
    && chown mediagen:mediagen /data/media
COPY --from=build /opt/venv /opt/venv
WORKDIR /srv/mediagen
COPY alembic.ini ./
COPY alembic/ alembic/
COPY app/ app/
COPY sandbox/ sandbox/
COPY worker/ worker/
# Logs go to stdout, where the platform looks for them.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LOG_DIR= \
    LOG_FORMAT=json \
    STORAGE_PATH=/data/media \
    PORT=8000
USER mediagen
EXPOSE 8000
# For the API; the worker's services switch it off or bring their own.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/api/v1/health/live' % os.environ['PORT'], timeout=2)"]
# A shell only for ${PORT}; `exec` makes uvicorn process 1, which gets the SIGTERM.  Requests under
# way have 20 s from then on: without a bound one slow client holds the end up until the platform
# kills (30 s, see render.yaml and docker-compose.yml), and the parts need some seconds to close.
# FORWARDED_ALLOW_IPS says which proxies tell the client's address; unset: none but this machine's.
CMD ["sh", "-c", "exec uvicorn app.main:app --host 0.0.0.0 --port ${PORT:-8000} --proxy-headers --timeout-graceful-shutdown 20"]
