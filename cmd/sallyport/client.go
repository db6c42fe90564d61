package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/sqldb"
)

// app is what every command shares.
type app struct {
	streams cli.IO
	out     *cli.Output
}

// client returns a client of the gateway that the environment names.
func (a *app) client() (*api.Client, error) {
	c, err := config.LoadOperator(a.streams.Env)
	if err != nil {
		return nil, err
	}
	cfg := api.ClientConfig{URL: string(c.URL)}
	if cfg.URL == "" {
		cfg.URL = findSocket(c.Data, a.streams.Env)
	}
	if strings.HasPrefix(cfg.URL, "https://") { // over the socket the kernel says who asks
		token, err := c.Token()
		if err != nil {
			return nil, err
		}
		cfg.Token = token.Reveal()
	}
	if c.CAFile != "" {
		if cfg.Roots, err = readRoots(c.CAFile); err != nil {
			return nil, err
		}
	}
	client, err := api.NewClient(cfg)
	if err != nil {
		return nil, cli.Usage("SALLYPORT_URL: %w", err)
	}
	return client, nil
}

// findSocket returns the gateway's socket: where its own configuration puts
// it, when this environment holds that, or where root's gateway has it.
func findSocket(data string, environ []string) string {
	own := filepath.Join(data, "gateway", "api.sock")
	if g, err := config.LoadGateway(environ); err == nil {
		own = g.Socket
	}
	if _, err := os.Stat(own); errors.Is(err, fs.ErrNotExist) {
		system := filepath.Join(config.SystemData, "gateway", "api.sock")
		if _, err := os.Stat(system); err == nil || errors.Is(err, fs.ErrPermission) { // which the refusal says
			return system
		}
	}
	return own
}

func readRoots(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read SALLYPORT_CA_FILE: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read SALLYPORT_CA_FILE: %s holds no certificate in PEM form", file)
	}
	return pool, nil
}

// explainErrors lets every command of the tree return what the API answered:
// the exit code and the advice are chosen here, once.
func explainErrors(cmd *cobra.Command) {
	if run := cmd.RunE; run != nil {
		explain := explain
		if cmd.Name() == nameRun && cmd.Parent() == cmd.Root() { // action run is no role
			explain = explainRole
		}
		cmd.RunE = func(cmd *cobra.Command, args []string) error { return explain(run(cmd, args)) }
	}
	for _, c := range cmd.Commands() {
		explainErrors(c)
	}
}

// explainRole is explain for the roles themselves: an address that refuses, or a
// certificate that is not trusted, is not that of the gateway's API.
func explainRole(err error) error {
	if errors.Is(err, sqldb.ErrLocked) {
		return &cli.ExitError{Code: cli.ExitRefused, Err: err}
	}
	return err
}

func explain(err error) error {
	var exit *cli.ExitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	if p, ok := errors.AsType[*api.Problem](err); ok {
		return &cli.ExitError{Code: problemCode(p.Code), Err: err}
	}
	var path *fs.PathError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.Is(err, sqldb.ErrLocked):
		return &cli.ExitError{Code: cli.ExitRefused, Err: err}
	case errors.As(err, &path):
		return err // a file on this side, not the socket
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: no gateway answers there; start one with `sallyport run gateway`, or set SALLYPORT_URL or SALLYPORT_DATA to where it is", err)
	case errors.Is(err, fs.ErrPermission):
		return cli.Fail(cli.ExitRefused, "%w: the gateway's socket is for root and the group sallyport; join that group, or use https:// with SALLYPORT_URL and SALLYPORT_TOKEN_FILE", err)
	case errors.As(err, &unknown):
		return fmt.Errorf("%w: set SALLYPORT_CA_FILE to the CA of the gateway's API", err)
	}
	return err
}

func problemCode(c api.Code) int {
	switch c {
	case api.CodeInvalid, api.CodeMalformed, api.CodeMethod, api.CodeUnsupported:
		return cli.ExitUsage
	case api.CodeNotFound:
		return cli.ExitNotFound
	case api.CodeUnauthorized, api.CodeForbidden, api.CodeAmbiguous, api.CodeNameInUse, api.CodeExists, api.CodeConflict,
		api.CodeChanged, api.CodeTooLarge, api.CodeLocked, api.CodeBusy:
		return cli.ExitRefused
	case api.CodeTimeout:
		return cli.ExitTimeout
	}
	return cli.ExitFailed
}

// call runs f with a client; most verbs are no more than that.
func call[T any](ctx context.Context, a *app, f func(context.Context, *api.Client) (T, error)) (T, error) {
	c, err := a.client()
	if err != nil {
		var zero T
		return zero, err
	}
	defer c.Close()
	return f(ctx, c)
}

// tell has what f answers printed.
func tell[T any](ctx context.Context, a *app, show func(T) error, f func(context.Context, *api.Client) (T, error)) error {
	v, err := call(ctx, a, f)
	if err != nil {
		return err
	}
	return show(v)
}

// printed prints one as a table of one row.
func printed[T any](a *app, table func(...T) cli.Table) func(T) error {
	return func(v T) error { return a.out.Print(v, table(v)) }
}

// listed prints a list as a table.
func listed[T any](a *app, table func(...T) cli.Table) func([]T) error {
	return func(all []T) error { return a.out.Print(all, table(all...)) }
}

// deletes is a verb that deletes what its argument names.
func (a *app) deletes(f func(*api.Client, context.Context, string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		return tell(cmd.Context(), a, func(struct{}) error { a.out.Note("deleted"); return nil },
			func(ctx context.Context, c *api.Client) (struct{}, error) { return struct{}{}, f(c, ctx, args[0]) })
	}
}

// completeNames completes the first arguments with what list returns; at most
// so many, 0 for any number. A gateway that does not answer completes nothing.
func (a *app) completeNames(most int, list func(context.Context, *api.Client) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		names, err := call(ctx, a, list)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var fit []string
		for _, n := range names {
			if strings.HasPrefix(n, toComplete) {
				fit = append(fit, n)
			}
		}
		return fit, cobra.ShellCompDirectiveNoFileComp
	}
}

// namesOf makes a completion source of a list call.
func namesOf[T any](list func(*api.Client, context.Context) ([]T, error), name func(T) string) func(context.Context, *api.Client) ([]string, error) {
	return func(ctx context.Context, c *api.Client) ([]string, error) {
		items, err := list(c, ctx)
		if err != nil {
			return nil, err
		}
		names := make([]string, len(items))
		for i, item := range items {
			names[i] = name(item)
		}
		return names, nil
	}
}

func fixed(values ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
}

func deref[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

func now() time.Time { return time.Now() }
