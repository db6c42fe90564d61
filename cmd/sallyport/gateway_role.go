package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/gateway"
	"sallyport/gateway/backup"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/admin"
	"sallyport/internal/cli"
	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// gatewayHost is a gateway with what it needs on its host: the lock on its
// directory, the certificate authority, the database, its identity, the local
// socket and the admin listener.
type gatewayHost struct {
	cfg config.Gateway
	pki config.PKI
	log *slog.Logger
	reg *prometheus.Registry
}

func (a *app) gatewayRole() (cli.Role, error) {
	c, err := config.LoadGateway(a.streams.Env)
	if err != nil {
		return cli.Role{}, err
	}
	p, err := config.LoadPKI(a.streams.Env)
	if err != nil {
		return cli.Role{}, err
	}
	return cli.NewRole("gateway", c.Common, a.streams, func(log *slog.Logger, reg *prometheus.Registry) (func(context.Context) error, error) {
		h := &gatewayHost{cfg: c, pki: p, log: log, reg: reg}
		return h.run, nil
	})
}

// run opens everything, in the order of need, and closes it in the other.
func (h *gatewayHost) run(ctx context.Context) (err error) {
	dir := h.cfg.Dir(string(wire.RoleGateway))
	var closers []func() error
	defer func() {
		for i := len(closers) - 1; i >= 0; i-- {
			err = errors.Join(err, closers[i]())
		}
		if err != nil {
			err = fmt.Errorf("gateway: %w", err)
		}
	}()
	lock, err := lockdir.Acquire(dir)
	if err != nil {
		return err
	}
	closers = append(closers, lock.Release)
	if err := backup.Interrupted(gatewayPlace(h.cfg)); err != nil {
		return &cli.ExitError{Code: cli.ExitRefused, Err: err}
	}
	if err := backup.Tidy(gatewayPlace(h.cfg)); err != nil {
		h.log.Warn("what a backup or a restoration left when it was killed cannot be removed", "error", err)
	}
	wakes := &bus.Local{}
	db, err := store.Open(ctx, store.Config{Path: h.cfg.Database, Log: h.log, Bus: wakes})
	if err != nil {
		return err
	}
	closers = append(closers, db.Close)
	id, err := identity.Open(filepath.Join(dir, "identity"), wire.RoleGateway)
	if err != nil {
		return err
	}
	identity.WarnExposed(h.log, filepath.Join(dir, "identity", "key*.pem"))
	ca, keep, closeCA, err := h.authority(ctx, dir, id)
	if err != nil {
		return err
	}
	closers = append(closers, closeCA)
	deps := gateway.Deps{Store: db, Bus: wakes, CA: ca, Identity: id, Log: h.log, Metrics: h.reg}
	if len(h.cfg.Doors) > 0 {
		if deps.Doors, err = ca.Doors(ctx, string(h.cfg.DoorsURL)); err != nil {
			return fmt.Errorf("SALLYPORT_GATEWAY_DOORS: %w", err)
		}
	}
	server, err := gateway.New(gateway.Config{Gateway: h.cfg, Program: cli.BuildVersion()}, deps)
	if err != nil {
		return err
	}
	h.log.InfoContext(ctx, "gateway starts", "version", cli.BuildVersion(), "id", id.ID(), "fingerprint", id.Fingerprint(),
		"trust_domain", ca.TrustDomain(), "installation", db.Installation().UID)
	return h.serve(ctx, dir, server, keep)
}

// certifier is a certificate authority, in this process or in another.
type certifier interface {
	gateway.Issuer
	Doors(ctx context.Context, baseURL string) (*pki.Doors, error)
}

// authority is the one in this process, or the one that the configuration
// names; keep runs as long as the gateway does.
func (h *gatewayHost) authority(ctx context.Context, dir string, id *identity.Identity) (ca certifier, keep func(context.Context) error, done func() error, err error) {
	if h.cfg.PKI == "" {
		if err := h.elsewhere(id); err != nil {
			return nil, nil, nil, err
		}
		a, err := openAuthority(ctx, h.pki, h.log)
		if err != nil {
			return nil, nil, nil, err
		}
		return a, a.Keep, a.Close, nil
	}
	c, err := pki.Connect(ctx, pki.ClientConfig{Addr: h.cfg.PKI, CodeFile: h.cfg.PKICodeFile, Dir: dir, Identity: id, Log: h.log})
	if err != nil {
		return nil, nil, nil, err
	}
	return c, c.Run, func() error { c.Close(); return nil }, nil
}

// elsewhere refuses to have a new authority made for a gateway that belongs to
// one: no party trusts it, and the next backup would hold it. An external CA is
// found again by its root.
func (h *gatewayHost) elsewhere(id *identity.Identity) error {
	td, dir := id.TrustDomain(), h.pki.Dir("pki")
	if td == "" || h.pki.CA != "" {
		return nil
	}
	here, err := pki.Exists(dir)
	if here || err != nil {
		return err
	}
	return fmt.Errorf("this gateway and its parties are of %s, and its certificate authority is not in %s: "+
		"where it is a process of its own (run pki), set SALLYPORT_GATEWAY_PKI as it was; else put that directory back, or restore both from one backup (`sallyport restore FILE`); "+
		"without either move %s away, and every party has to enrol again", td, dir, id.Dir())
}

// gatewayStopped tells the doctor why a gateway does not start again.
func gatewayStopped(ctx context.Context, env []string, role wire.Role) (why, fix string) {
	c, err := config.LoadGateway(env)
	if role != wire.RoleGateway || err != nil {
		return "", ""
	}
	return gateway.Stopped(ctx, c.Database)
}

// serve opens the doors on this host and runs the gateway behind them.
func (h *gatewayHost) serve(ctx context.Context, dir string, server *gateway.Server, keep func(context.Context) error) error {
	socket, err := local.Listen(dir, server, h.log)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	if h.cfg.AdminListen != "" {
		web, err := admin.Listen(admin.Config{Addr: string(h.cfg.AdminListen), Gatherer: h.reg, Ready: server.Ready, Log: h.log})
		if err != nil {
			return errors.Join(err, socket.Close())
		}
		g.Go(func() error { return web.Run(ctx) })
	}
	g.Go(func() error { return socket.Run(ctx) })
	g.Go(func() error { return keep(ctx) })
	g.Go(func() error { return server.Run(ctx) })
	err = g.Wait()
	if errors.Is(err, gateway.ErrSuperseded) {
		return &cli.ExitError{Code: cli.ExitRefused, Err: err}
	}
	return err
}
