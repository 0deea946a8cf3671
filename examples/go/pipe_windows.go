// A named pipe of Windows, as if it were a socket on which each frame has its length before it.

package main

import (
	"io"
	"syscall"
	"unsafe"
)

var (
	kernel32            = syscall.NewLazyDLL("kernel32.dll")
	createEvent         = kernel32.NewProc("CreateEventW")
	getOverlappedResult = kernel32.NewProc("GetOverlappedResult")
	setPipeState        = kernel32.NewProc("SetNamedPipeHandleState")
)

const (
	overlappedFlag = 0x40000000 // or a write would wait until a read is done
	messageMode    = 2          // or nobody would know where a frame ends
	moreData       = syscall.Errno(234)
)

type pipe struct {
	handle syscall.Handle
	unread []byte // of the last frame
}

func dialPipe(address string) (io.ReadWriteCloser, error) {
	name, err := syscall.UTF16PtrFromString(address)
	if err != nil {
		return nil, err
	}
	access := uint32(syscall.GENERIC_READ | syscall.GENERIC_WRITE)
	handle, err := syscall.CreateFile(name, access, 0, nil, syscall.OPEN_EXISTING, overlappedFlag, 0)
	if err != nil {
		return nil, err
	}
	mode := uint32(messageMode)
	if done, _, err := setPipeState.Call(uintptr(handle), uintptr(unsafe.Pointer(&mode)), 0, 0); done == 0 {
		return nil, err
	}
	return &pipe{handle: handle}, nil
}

// Begin a read or a write, and wait until it is done. The error moreData comes with a part of a message.
func (p *pipe) run(begin func(done *uint32, overlapped *syscall.Overlapped) error) (int, error) {
	event, _, err := createEvent.Call(0, 1, 0, 0)
	if event == 0 {
		return 0, err
	}
	defer syscall.CloseHandle(syscall.Handle(event))
	done, overlapped := new(uint32), &syscall.Overlapped{HEvent: syscall.Handle(event)}
	if err := begin(done, overlapped); err != nil && err != syscall.ERROR_IO_PENDING && err != moreData {
		return 0, err
	}
	ok, _, err := getOverlappedResult.Call(uintptr(p.handle), uintptr(unsafe.Pointer(overlapped)), uintptr(unsafe.Pointer(done)), 1)
	if ok == 0 {
		return int(*done), err
	}
	return int(*done), nil
}

func (p *pipe) Read(into []byte) (int, error) {
	if len(p.unread) == 0 {
		var frame []byte
		for err := error(moreData); err == moreData; {
			part, count := make([]byte, 1<<16), 0
			count, err = p.run(func(done *uint32, overlapped *syscall.Overlapped) error {
				return syscall.ReadFile(p.handle, part, done, overlapped)
			})
			if err != nil && err != moreData {
				return 0, err
			}
			frame = append(frame, part[:count]...)
		}
		p.unread = prefixed(frame)
	}
	count := copy(into, p.unread)
	p.unread = p.unread[count:]
	return count, nil
}

func (p *pipe) Write(frame []byte) (int, error) {
	count, err := p.run(func(done *uint32, overlapped *syscall.Overlapped) error {
		return syscall.WriteFile(p.handle, frame[4:], done, overlapped)
	})
	return 4 + count, err
}

func (p *pipe) Close() error { return syscall.CloseHandle(p.handle) }
