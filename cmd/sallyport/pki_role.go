package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/internal/admin"
	"sallyport/internal/cli"
	"sallyport/pki"
)

// openAuthority opens the certificate authority of this host.
func openAuthority(ctx context.Context, c config.PKI, log *slog.Logger) (*pki.Authority, error) {
	opts, err := caOptions(c)
	if err != nil {
		return nil, err
	}
	return pki.Open(ctx, c.Dir("pki"), log, opts...)
}

// caOptions say where the authority's keys are, and who issues for it.
func caOptions(c config.PKI) ([]pki.Option, error) {
	opts, err := keyOptions(c)
	if err != nil || c.CA == "" {
		return opts, err
	}
	external, err := externalCA(c)
	if err != nil {
		return nil, err
	}
	return append(opts, pki.WithExternal(external)), nil
}

func externalCA(c config.PKI) (e pki.External, err error) {
	e = pki.External{URL: c.CA, Provisioner: c.CAProvisioner, KeyFile: c.CAKeyFile}
	if c.CARootFile != "" {
		chain, err := readChain(c.CARootFile)
		if err != nil {
			return e, fmt.Errorf("SALLYPORT_PKI_CA_ROOT_FILE: %w", err)
		}
		e.Root = chain[len(chain)-1]
	}
	if e.Fingerprint, err = c.CAFingerprintSum(); err != nil {
		return e, err
	}
	password, err := c.CAPassword()
	if err != nil {
		return e, err
	}
	if password != "" {
		e.Password = []byte(password.Reveal())
	}
	return e, nil
}

// keyOptions say where the authority's keys are.
func keyOptions(c config.PKI) (opts []pki.Option, err error) {
	passphrase, err := c.Passphrase()
	if err != nil {
		return nil, err
	}
	if passphrase != "" {
		opts = append(opts, pki.WithPassphrase([]byte(passphrase.Reveal())))
	}
	if c.Signer != "" {
		opts = append(opts, pki.WithSigner(c.Signer))
	}
	return opts, nil
}

// pkiRole is the certificate authority as a process of its own.
func (a *app) pkiRole() (cli.Role, error) {
	c, err := config.LoadPKI(a.streams.Env)
	if err != nil {
		return cli.Role{}, err
	}
	return cli.NewRole("pki", c.Common, a.streams, func(log *slog.Logger, reg *prometheus.Registry) (func(context.Context) error, error) {
		return func(ctx context.Context) error { return runPKI(ctx, c, log, reg) }, nil
	})
}

func runPKI(ctx context.Context, c config.PKI, log *slog.Logger, reg *prometheus.Registry) (err error) {
	ca, err := openAuthority(ctx, c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ca.Close()) }()
	server, err := pki.Listen(ca, c.Listen, log, reg)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	if c.AdminListen != "" {
		web, err := admin.Listen(admin.Config{Addr: string(c.AdminListen), Gatherer: reg, Ready: server.Ready, Log: log})
		if err != nil {
			return fmt.Errorf("pki: %w", errors.Join(err, server.Close()))
		}
		g.Go(func() error { return web.Run(ctx) })
	}
	log.InfoContext(ctx, "certificate authority starts", "version", cli.BuildVersion(), "trust_domain", ca.TrustDomain(), "listen", server.Addr().String())
	g.Go(func() error { return server.Run(ctx) })
	g.Go(func() error { return ca.Keep(ctx) })
	return g.Wait()
}
