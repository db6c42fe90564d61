package main

import (
	"context"
	"log/slog"

	"sallyport/config"
	"sallyport/pki"
)

// openAuthority opens the certificate authority of this host.
func openAuthority(ctx context.Context, c config.PKI, log *slog.Logger) (*pki.Authority, error) {
	passphrase, err := c.Passphrase()
	if err != nil {
		return nil, err
	}
	var opts []pki.Option
	if passphrase != "" {
		opts = append(opts, pki.WithPassphrase([]byte(passphrase.Reveal())))
	}
	return pki.Open(ctx, c.Dir("pki"), log, opts...)
}
