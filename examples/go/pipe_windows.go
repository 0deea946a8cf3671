// The host's named pipe on Windows. Each frame is a message there, without its length.

package main

import (
	"io"
	"runtime"
	"syscall"
	"unsafe"
)

type pipe struct {
	io.Reader // what has come, each frame with its length before it
	handle    syscall.Handle
}

var kernel32 = syscall.NewLazyDLL("kernel32.dll")

func init() { dial = dialPipe }

func dialPipe(address string) (io.ReadWriter, error) {
	name, err := syscall.UTF16PtrFromString(address)
	if err != nil {
		return nil, err
	}
	const access, overlapped = syscall.GENERIC_READ | syscall.GENERIC_WRITE, 0x40000000
	handle, err := syscall.CreateFile(name, access, 0, nil, syscall.OPEN_EXISTING, overlapped, 0)
	if err != nil {
		return nil, err
	}
	mode := uint32(2) // message by message
	kernel32.NewProc("SetNamedPipeHandleState").Call(uintptr(handle), uintptr(unsafe.Pointer(&mode)), 0, 0)
	reader, writer := io.Pipe()
	go readPipe(handle, writer)
	return pipe{reader, handle}, nil
}

func readPipe(handle syscall.Handle, into *io.PipeWriter) {
	var frame []byte
	for part := make([]byte, 1<<16); ; {
		count, status := run(func(o *syscall.Overlapped) error { return syscall.ReadFile(handle, part, nil, o) })
		frame = append(frame, part[:count]...)
		if status == 0 {
			into.Write(prefixed(frame))
			frame = nil
		} else if status != 0x80000005 { // which would be a part of a message
			into.Close()
			return
		}
	}
}

func (p pipe) Write(frame []byte) (int, error) {
	run(func(o *syscall.Overlapped) error { return syscall.WriteFile(p.handle, frame[4:], nil, o) })
	return len(frame), nil // if the host is gone, whoever reads learns it
}

// run begins to read or to write, and waits until that is done. It gives the number of bytes, and the status.
func run(begin func(*syscall.Overlapped) error) (uintptr, uintptr) {
	event, _, _ := kernel32.NewProc("CreateEventW").Call(0, 1, 0, 0)
	defer syscall.CloseHandle(syscall.Handle(event))
	o := &syscall.Overlapped{Internal: 1, HEvent: syscall.Handle(event)}
	if begin(o) == syscall.ERROR_IO_PENDING {
		syscall.WaitForSingleObject(o.HEvent, syscall.INFINITE)
	}
	runtime.KeepAlive(begin) // and with it the bytes
	return o.InternalHigh, o.Internal
}
