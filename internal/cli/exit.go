package cli

import (
	"context"
	"errors"
	"fmt"

	"sallyport/config"
	"sallyport/internal/local"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

// Exit codes: part of the contract with scripts.
const (
	ExitOK       = 0
	ExitFailed   = 1
	ExitUsage    = 2
	ExitNotFound = 3
	ExitRefused  = 4 // refused, or the directory is locked by another process
	ExitTimeout  = 5
)

// ExitError gives an error its exit code. Without an Err it prints nothing.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string {
	if e.Err == nil {
		return ""
	}
	return e.Err.Error()
}

func (e *ExitError) Unwrap() error { return e.Err }

// Fail makes an error with an exit code.
func Fail(code int, format string, args ...any) error {
	return &ExitError{Code: code, Err: fmt.Errorf(format, args...)}
}

// usageError says that the command line itself is wrong.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// Usage makes an error that exits with 2 and points to --help.
func Usage(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// Code returns the exit code of an error.
func Code(err error) int {
	var exit *ExitError
	var usage *usageError
	var answer *local.Error
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &exit):
		return exit.Code
	case errors.As(err, &usage), errors.Is(err, config.ErrConfig), errors.Is(err, wire.ErrJoinCode), errors.Is(err, wire.ErrJoinRole):
		return ExitUsage
	case errors.Is(err, lockdir.ErrLocked):
		return ExitRefused
	case errors.As(err, &answer):
		return localCode(answer.Code)
	case errors.Is(err, context.DeadlineExceeded):
		return ExitTimeout
	}
	return ExitFailed
}

func localCode(code string) int {
	switch code {
	case local.CodeInvalid:
		return ExitUsage
	case local.CodeNotFound:
		return ExitNotFound
	case local.CodeForbidden, local.CodeRefused, local.CodeUnsupported, local.CodeBusy:
		return ExitRefused
	}
	return ExitFailed
}
