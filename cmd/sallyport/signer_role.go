package main

import (
	"context"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/config"
	"sallyport/internal/cli"
	"sallyport/pki"
)

// signerRole keeps the CA's keys in a process of its own.
func (a *app) signerRole() (cli.Role, error) {
	c, err := config.LoadSigner(a.streams.Env)
	if err != nil {
		return cli.Role{}, err
	}
	return cli.NewRole("signer", c.Common, a.streams, func(log *slog.Logger, _ *prometheus.Registry) (func(context.Context) error, error) {
		return func(ctx context.Context) error {
			passphrase, err := c.Passphrase()
			if err != nil {
				return err
			}
			cfg := pki.SignerConfig{Dir: c.Dir("signer"), Socket: c.Listen, Users: c.Users, TPM: c.TPM, Log: log}
			if passphrase != "" {
				cfg.Passphrase = []byte(passphrase.Reveal())
			}
			s, err := pki.OpenSigner(cfg)
			if err != nil {
				return err
			}
			log.InfoContext(ctx, "signer starts", "version", cli.BuildVersion(), "listen", c.Listen)
			return s.Run(ctx)
		}, nil
	})
}
