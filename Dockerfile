# One image for every service; the command says which one a container is.

FROM python:3.11-slim AS build
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv --without-pip /opt/shadowmmu

# What is needed to build and to run, before the sources: these layers change seldom.
COPY constraints.txt pyproject.toml ./
COPY requirements requirements
RUN python -m pip install -q -c constraints.txt -r requirements/build.txt
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['live'], sep='\n')" > requirements/run.txt \
    && python -m pip --python /opt/shadowmmu/bin/python install -q -c constraints.txt -r requirements/run.txt

COPY LICENSE README.md ./
COPY protocol protocol
COPY services services
COPY workers workers
RUN python -m pip wheel -q --no-deps --no-build-isolation -w dist . \
    && python -m pip --python /opt/shadowmmu/bin/python install -q --no-deps --no-index dist/*.whl \
    && /opt/shadowmmu/bin/python -m compileall -q /opt/shadowmmu/lib


FROM python:3.11-slim
# Who runs it, where reports go, and keys: a volume mounted there inherits owner and mode.
RUN groupadd --gid 10001 shadowmmu \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin shadowmmu \
    && install -d -o shadowmmu -g shadowmmu /var/lib/shadowmmu \
    && install -d -o shadowmmu -g shadowmmu -m 0700 /etc/shadowmmu/keys
COPY --from=build /opt/shadowmmu /opt/shadowmmu
ENV PATH=/opt/shadowmmu/bin:$PATH PYTHONUNBUFFERED=1
USER shadowmmu
WORKDIR /var/lib/shadowmmu
ENTRYPOINT ["shadowmmu"]
CMD ["--help"]
