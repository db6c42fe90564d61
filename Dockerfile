# The three programs, static, in an image with nothing else:
#   docker build -t sallyport .
#   docker run -v sallyport:/var/lib/sallyport -p 9090:9090 -p 9090:9090/udp sallyport run rcp
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags=-s \
      -tags nobadger,nobbolt,nomysql,nopgx,noawskms,nocloudkms,noazurekms,notpmkms,nopkcs11,noyubikey \
      -o /out/ ./cmd/... \
 && mkdir -p /state/var/lib/sallyport

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/ /usr/bin/
COPY --from=build --chown=65532:65532 /state/ /
ENV SALLYPORT_DATA=/var/lib/sallyport
USER 65532:65532
VOLUME /var/lib/sallyport
EXPOSE 9090/tcp 9090/udp
ENTRYPOINT ["/usr/bin/sallyport"]
CMD ["--help"]
