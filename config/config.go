// Package config turns environment variables into typed structs, one per role.
//
// It fails closed: an unknown SALLYPORT_ variable, a value that does not parse
// and a setting that this version does not support yet all refuse to start,
// with the variable's name and what is accepted. Every role's variables are
// known to every program, so that one environment file can serve a whole host;
// only the values of the roles that are started are read.
//
// The structs are the reference: their tags carry the defaults, what each
// setting does and why the default is what it is (see [Reference]). An empty
// value is the same as none, but for the allow lists of a node, where an empty
// value allows nothing.
package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/caarlos0/env/v10"
)

// Prefix begins every variable of ours.
const Prefix = "SALLYPORT_"

// ErrConfig is wrapped by every error of this package that says that a
// variable is wrong. Programs exit with 2 on it.
var ErrConfig = errors.New("configuration")

// Error is one variable that is wrong.
type Error struct {
	Variable string
	Problem  string // what is wrong and what is accepted
}

func (e *Error) Error() string { return e.Variable + ": " + e.Problem }

// Is makes every Error an [ErrConfig].
func (e *Error) Is(target error) bool { return target == ErrConfig }

func wrong(variable, format string, args ...any) error {
	return &Error{Variable: variable, Problem: fmt.Sprintf(format, args...)}
}

// Common is what every role reads.
type Common struct {
	Data      string    `env:"SALLYPORT_DATA" doc:"directory of all state; every role keeps to its own sub-directory and locks it" form:"a directory" why:"/var/lib/sallyport for root, the XDG data directory otherwise: a trial needs no root"`
	LogLevel  LogLevel  `env:"SALLYPORT_LOG_LEVEL" envDefault:"info" doc:"least level that is logged, on stderr" form:"debug, info, warn or error" why:"transitions and refusals, not every request"`
	LogFormat LogFormat `env:"SALLYPORT_LOG_FORMAT" envDefault:"text" doc:"form of the log lines" form:"text or json" why:"people read first; json is for collectors"`
}

// Dir returns the sub-directory of one role.
func (c Common) Dir(role string) string { return filepath.Join(c.Data, role) }

// LocalSocket returns the path of one role's local socket.
func (c Common) LocalSocket(role string) string { return filepath.Join(c.Dir(role), "local.sock") }

// load fills v, a pointer to one of the role structs, from environ
// ("NAME=value" lines, as os.Environ returns them).
func load(v validator, environ []string) error {
	if err := Known(environ); err != nil {
		return err
	}
	return parse(v, env.ToMap(environ))
}

// validator is a role struct: validate completes computed defaults and refuses
// what needs more than one variable to judge, or is not supported yet.
type validator interface {
	common() *Common
	validate() error
}

func parse(v validator, environ map[string]string) error {
	set := make(map[string]string, len(environ))
	fields := fieldsOf(v)
	names := map[string]string{} // Go field → variable
	for _, f := range fields {
		names[f.goName] = f.Name
		if value, ok := environ[f.Name]; ok {
			set[f.Name] = value
			if value == "" && isList(f.typ) {
				set[f.Name] = none
			}
		}
	}
	if err := env.ParseWithOptions(v, env.Options{Environment: set}); err != nil {
		return nameVariables(err, names)
	}
	if err := completeData(v.common(), environ); err != nil {
		return err
	}
	return v.validate()
}

// isList tells an allow list, where an empty value is a value.
func isList(t reflect.Type) bool {
	return t == reflect.TypeFor[Globs]() || t == reflect.TypeFor[HostPorts]()
}

// nameVariables replaces the Go field names in the library's errors by the
// names that the operator wrote.
func nameVariables(err error, names map[string]string) error {
	var all env.AggregateError
	if !errors.As(err, &all) {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	var errs []error
	for _, e := range all.Errors {
		var p env.ParseError
		if errors.As(e, &p) && names[p.Name] != "" {
			errs = append(errs, &Error{Variable: names[p.Name], Problem: p.Err.Error()})
			continue
		}
		errs = append(errs, fmt.Errorf("%w: %w", ErrConfig, e))
	}
	return errors.Join(errs...)
}

// completeData applies the default of SALLYPORT_DATA, which depends on who asks,
// and makes the path absolute: sockets and locks must not move with a chdir.
func completeData(c *Common, environ map[string]string) error {
	if c.Data == "" {
		d, err := defaultData(environ, os.Geteuid())
		if err != nil {
			return err
		}
		c.Data = d
	}
	abs, err := filepath.Abs(c.Data)
	if err != nil {
		return wrong("SALLYPORT_DATA", "%v", err)
	}
	c.Data = abs
	return nil
}

// SystemData is the data directory of root, where operators look for a gateway
// when their own data directory holds none.
const SystemData = "/var/lib/sallyport"

func defaultData(environ map[string]string, uid int) (string, error) {
	if uid == 0 {
		return SystemData, nil
	}
	// XDG Base Directory Specification: a relative XDG_DATA_HOME is invalid and ignored.
	if d := environ["XDG_DATA_HOME"]; filepath.IsAbs(d) {
		return filepath.Join(d, "sallyport"), nil
	}
	if d := environ["HOME"]; filepath.IsAbs(d) {
		return filepath.Join(d, ".local", "share", "sallyport"), nil
	}
	return "", wrong("SALLYPORT_DATA", "not set, and neither XDG_DATA_HOME nor HOME says where the data of this user lives; set it to a directory")
}

// quote shows a value in an error, shortened: it may be a whole file that
// somebody pasted.
func quote(s string) string {
	const limit = 60
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return fmt.Sprintf("%q", s)
}

// oneOf checks a value against a closed list.
func oneOf(value string, accepted ...string) (string, error) {
	for _, a := range accepted {
		if value == a {
			return a, nil
		}
	}
	last := len(accepted) - 1
	return "", fmt.Errorf("%s is not accepted; want %s or %s", quote(value), strings.Join(accepted[:last], ", "), accepted[last])
}
